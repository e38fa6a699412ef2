"""The two models that are held against each other, and what running them takes.

`llama_cpp` runs a GGUF file (`llama_library` through its C functions, `llama_process` in a process of its own),
`reference` runs the checkpoint in transformers (`devices`: on what), `activations` measures an importance matrix on it,
`reference_tokenizers` and `vocabulary_model` turn texts into tokens, `template_process` chats into texts in a
`child_process`, `ggml` has llama.cpp's own quantizers. torch, transformers and xllamacpp are imported only when an
engine is made.
"""
