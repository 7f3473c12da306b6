"""Extensions that run inside a vLLM server, in its interpreter; atlas_jax does not import them."""
