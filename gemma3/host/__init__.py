"""What the program asks of the machine it runs on: directories that appear whole, progress, peak memory."""
