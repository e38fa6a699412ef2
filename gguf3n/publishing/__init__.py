"""What stands around finished files so that others can find, choose and run them.

terms.py        what Gemma's license asks of those who pass a model on
labels.py       which file of a repository a tag gives, by the rules of llama.cpp, the Hub and Ollama
repository.py   a directory or a repository on the Hub: names of files, and the small ones to read
checks.py       what such a repository can have wrong, and the function that goes through it
ollama.py       Modelfile, and the template and parameters that the Hub gives to Ollama
front_matter.py a card's YAML: read, and changed a key at a time
measured.py     what validation has said of the files beside its reports
checksums.py    SHA256SUMS
card.py         README.md, Notice and SHA256SUMS
manifest.py     what a file was made of
verify.py       making a file again from its manifest, and comparing
ledger.py       what a publication has done already
publish.py      all of it in one call
"""
