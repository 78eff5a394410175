"""Tokenizers: SentencePiece, bytes, and Hugging Face's tokenizer.json."""
