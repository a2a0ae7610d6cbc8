"""What the program needs from the machine it runs on: directories that appear whole, progress, peak memory."""
