"""The whole story on a CPU, offline."""
