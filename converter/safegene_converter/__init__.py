"""Folds a SafeGene adapter into the files people run, and reports how much of it survived.

    adapter folder -> adapter.py -> Adapter --+
      (safetensors_reader, peft_config)       |-> to_gguf.py -> artifact folder with manifest.json
    GGUF or HF folder -> base.py -> Base -----+     formula.py    dW = c * s * B A, its only home
                                                    names.py      module -> tensor, row order
                                                    ggml.py       native encode and decode
                                                    survival.py   what rounding left of dW
                                                    selfcheck.py  other people's readers agree
    adapter + base -> recorder.py (torch) -> reference folder
    cli.py parses and prints; inspecting.py and demo.py are what it prints.

Imports the runtime, never the other way round. Only recorder.py imports torch.
"""
