"""Where records go. A sink takes a record without blocking and without raising, whatever happens at its far end, and counts what it
could not keep; so none can stall the daemon or another sink."""
