"""A model behind HTTP, as OpenAI's API has it: requests, the engine that runs them, the application, metrics."""
