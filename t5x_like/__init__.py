"""t5x_like: training for encoder, decoder, prefix-LM and encoder-decoder models with a mixture of denoisers."""

__version__ = "0.1.0"
