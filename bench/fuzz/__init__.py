"""The fuzzer's parts: children that run a case, what is damaged, random models, random command lines."""
