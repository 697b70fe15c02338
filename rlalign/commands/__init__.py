"""What the command line does, one file a theme. Nothing here is imported before its command is asked for."""
