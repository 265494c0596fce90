"""What commands share: flags, and the command that was typed."""
