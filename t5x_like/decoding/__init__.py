"""Decoding: text from a trained model, by a loop over a key/value cache with sampling, beam search or speculation."""
