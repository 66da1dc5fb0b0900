"""What an artifact is: its manifest, where it came from, and what its weights serve.

    forms         the forms of an artifact, and what follows from each
    manifest      manifest.json: its fields, and the files it lists
    recomputed    what in a manifest follows from the rest of it: scales, sums, the verdict
    base_proof    how the plain base was proved
    provenance    what a model file says of the artifact it is part of
    changed       which tensor of a file was changed, for the message
    integrity     the folder held against its manifest, before anything is loaded
    onnx_checks   the same of a graph
    served        what is served of a weight; served_gguf and served_onnx read it

Nothing here runs an engine.
"""
