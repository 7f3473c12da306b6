"""What runs inside a vLLM server, in its interpreter; nothing of atlas_jax imports it."""
