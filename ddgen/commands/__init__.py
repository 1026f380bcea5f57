"""The commands: settings in, rooms wired together, exit code out."""
