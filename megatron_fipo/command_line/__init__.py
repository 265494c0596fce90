"""Common parts of the commands: flags, and the command that was typed."""
