"""Which types lose least at a size: what each costs, measured; a budget of bytes; the recipe that spends it best.

measure     text through the model          ->  what each tensor costs in each type (formats/sensitivity.py)
costs       one of those figures for each tensor and type, from all that was measured
budget      "4.2GB", 4.5 bits, like Q4_K_M  ->  bytes of a whole file
knapsack    costs, bytes, a budget          ->  one type a tensor, and proof that none is better
allocate    all of these                    ->  a recipe with a reason a tensor
ladder      the same for many budgets, beside the stock mixtures
verify      the recipe's file and the stock one in llama.cpp
"""
