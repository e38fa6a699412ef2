"""Is the converted model the same model: two engines and a measure of how far apart they are.

`llama_cpp` runs a GGUF file, `reference` runs the checkpoint in transformers, `divergence` compares their next-token
distributions. The engines are imported only when one is made: neither torch nor llama.cpp is needed to convert.
"""
