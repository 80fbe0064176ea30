"""Llama and the models of its architecture: config, weights, session (the forward pass) and generation."""
