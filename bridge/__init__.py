"""The command, and later the daemon: what stands between a user or a DAW and the engine."""
