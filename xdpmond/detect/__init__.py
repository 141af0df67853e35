"""Pure detection: windows and events in, alerts out."""
