"""Is an exported file the model it claims to be?"""
