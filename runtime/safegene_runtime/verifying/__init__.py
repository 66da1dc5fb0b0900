"""An artifact held against a reference, rung by rung, cheap ones first."""
