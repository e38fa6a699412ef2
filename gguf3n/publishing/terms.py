"""What Gemma's license asks of those who pass a model on. Source: Gemma Terms of Use, section 3.1."""

LICENSE = "gemma"
"""As the Hub calls it."""
ADDRESS = "ai.google.dev/gemma/terms"
SENTENCE = f"Gemma is provided under and subject to the Gemma Terms of Use found at {ADDRESS}"
"""What a text file named Notice has to say, word for word."""

NOTICE = f"""{SENTENCE}

The files in this repository are modified: the weights of the original model were converted to GGUF files, and most of
them quantized. README.md says from which model, how and with what.
"""
