"""What the Kotlin tests compare with: one module for each part of the app."""
