"""Dialogues: messages, chat templates, and the tokens that the loss covers."""
