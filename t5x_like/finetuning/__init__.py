"""Facts about the model that a shipped recipe of fine-tuning starts from."""
