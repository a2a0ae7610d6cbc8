"""The proof that an exported file is the model that it claims to be."""
