"""Instruction data from annotations: contexts, teachers, generation."""
