"""The tilt inside vLLM: a logits processor for its engine, and a rollout sampler that runs one.

Nothing is exported here: vLLM imports `mavis.vllm.logits_processor` by name, and that module needs vLLM itself.
"""
