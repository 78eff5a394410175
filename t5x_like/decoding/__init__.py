"""Text out of a trained model: prompts, the decode loop over a key/value cache, sampling."""
