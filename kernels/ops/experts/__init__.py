"""The sparse experts: SwiGLU of each token's chosen experts; start at op.py."""
