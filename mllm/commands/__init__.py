"""Subcommands by group. One parses and calls, nothing more; heavy imports stand inside."""
