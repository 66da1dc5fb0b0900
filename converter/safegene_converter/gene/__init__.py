"""Making SafeGene adapters (arXiv 2606.06519): extract, select, calibrate, evaluate.

    extract     aligned - degraded, per linear module, as factors         factors, sources, consensus
    select      the layers that bring safety at the least cost, by data   select
    calibrate   one coefficient per layer for each target, few shots      calibrate, deployed
    evaluate    refusals, KL, task loss                                   evaluate

What comes out is an adapter folder that plain PEFT loads (`folder`). Besides `recorder` this is the
only package that imports torch, and of its modules only `model` and those that run one.
docs/method.md has the formulas and the choices.
"""
