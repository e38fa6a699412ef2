"""Is a GGUF file what its source says it should be: four stages, a verdict, a report.

`validate` runs the stages, which are `structure`, `tensors`, `tokens` and `logits`; `result` has what they share.
"""
