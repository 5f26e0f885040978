"""The track host: tracks, arm, bounce; the built-in session host."""
