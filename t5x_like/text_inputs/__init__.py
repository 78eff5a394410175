"""Texts as the rows of models that read each text as a whole: encoders of embeddings, and task heads."""
