"""A trained task for other runtimes: ONNX, torch.export and OpenVINO, each compared with the task it was made from."""
