"""What the program needs from its machine: whole directories, small files, signals, streams, progress, peak memory."""
