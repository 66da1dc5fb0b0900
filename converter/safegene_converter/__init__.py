"""Folds a SafeGene adapter into the files people run, and reports how much of it survived.

    adapter folder --> inputs --> bases --> gguf | onnx --> artifact folder with manifest.json
    adapter + base --> recording (torch) --> reference folder
    models that lost their safety --> gene (torch) --> adapter folder

    formula     dW = c * s * B A, its only home
    requests    what a command or a function is asked for, checked as a whole
    describing  adapters, artifacts and references as plain data
    importing   adapters that are not read directly, made plain
    inputs      adapters and bases as they come, read once and checked as a whole
    bases       a base in another format: Hugging Face to GGUF or ONNX, GGUF to Hugging Face
    encoding    weights into the bytes of a quantised type
    fold        what every form needs: survival of the delta, streams, lines of the manifest
    gguf        sidecar and merged GGUF
    onnx        merged, branch and adapter ONNX
    recording   PyTorch + PEFT, asked once
    gene        making an adapter: extract, select, calibrate, evaluate
    cli         the `safegene` command

Imports the runtime, never the other way round. Only `recording` and `gene` import torch, and the child
of `importing` that reads a pickle.
"""
