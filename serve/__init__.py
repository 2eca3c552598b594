"""The ways in: the `hone` command, the live view and the report."""
