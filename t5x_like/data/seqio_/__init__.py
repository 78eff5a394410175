"""Interoperation with seqio: live Tasks, our mixtures as Tasks, and evaluation with seqio's Evaluator."""
