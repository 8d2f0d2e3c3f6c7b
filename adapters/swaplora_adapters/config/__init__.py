"""adapter_config.json as an AdapterSpec: `parse` reads and refuses, `spec` has PEFT's rules. Imports `files`."""
