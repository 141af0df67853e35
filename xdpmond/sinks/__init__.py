"""The destinations of what the daemon has to say; one file a destination, none of which can stall another."""
