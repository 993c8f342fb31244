"""A server with OpenAI's protocol, and a page, over one `fastlm.inference.LLM`. Needs `fastlm[serve]`."""
