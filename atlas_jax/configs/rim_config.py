"""The judges with all that can be set: four judges, three temperatures, and an arbiter.

    launch/launch.sh 8 configs/run/teacher_rcl.py:rim=rim_config

Judges of our own instead of Gemini, on a vLLM server (`python -m atlas_jax.serve`):

    c.small_model.base_url = c.large_model.base_url = "http://localhost:8765/v1"
    c.small_model.model = c.large_model.model = "Qwen/Qwen3-32B"
"""

from ml_collections import ConfigDict


def apply(config: ConfigDict) -> None:
    c = config.reward.rim
    c.temperatures = (0.2, 0.5, 0.8)
    c.variance_threshold = 0.15
    c.uncertainty_threshold = 0.3
    c.arbiter_temperature = 0.3
    c.cache_dir = "~/.cache/atlas_jax/judges"
    c.cache_max_bytes = 2**30
    c.replay = False

    c.active_judges.accuracy = True
    c.active_judges.helpfulness = True
    c.active_judges.process = True
    c.active_judges.diagnostic = True
    c.judges = ()  # judges of one's own, "my_package.judges:BREVITY"
    c.judge_weights.accuracy = 1.0
    c.judge_weights.helpfulness = 1.0
    c.judge_weights.process = 1.0
    c.judge_weights.diagnostic = 1.0

    c.small_model.model = "gemini/gemini-2.5-flash"
    c.large_model.model = "gemini/gemini-2.5-pro"
    for model in (c.small_model, c.large_model):
        # -1 is the list price of these models; an endpoint of one's own has none unless it is set.
        model.input_price = model.output_price = -1.0
        model.base_url = ""
        model.api_key_env = ""  # a provider's model takes its key from the provider's variable
        model.response_format = "auto"
        model.max_tokens = 32768  # Gemini thinks before it writes, and that counts

    c.consistency_rules.process_over_accuracy = 0.1
    c.consistency_rules.process_for_helpfulness = 0.5
    c.consistency_rules.helpfulness_over_diagnostic = 0.1

    c.anti_gaming.enabled = True
    c.anti_gaming.max_repeated_frac = 0.6
    c.anti_gaming.ask_judges = False

    c.prompt.house_rules = ""
    c.prompt.show_ground_truth = True
    c.prompt.show_baseline = True
    c.prompt.max_chars = 12000

    c.limits.max_in_flight = 64
    c.limits.requests_per_minute = 1000
    c.limits.tokens_per_minute = 1_000_000
    c.limits.max_calls = 0
    c.limits.max_cost = 0.0
    c.limits.timeout_secs = 120.0
    c.limits.max_tries = 4
