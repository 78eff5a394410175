"""Other houses' checkpoints: Hugging Face's, read and written without torch or transformers."""
