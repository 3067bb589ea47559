"""Networks of the shapes that people prune, small enough for a test."""

import torch
from torch import nn
from torch.nn.functional import max_pool2d, relu


class Block(nn.Module):
    """Two convolutions and a shortcut: the basic block of ResNet-18."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(y + self.downsample(x))


class ResNet(nn.Module):
    """ResNet-18 with narrow stages."""

    def __init__(self, width=8, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, inputs = [], width
        for stage in range(4):
            outputs = width * 2**stage
            stages.append(nn.Sequential(Block(inputs, outputs, 1 + (stage > 0)), Block(outputs, outputs, 1)))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = max_pool2d(relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.dropout(self.stages(x).mean((2, 3))))


class Tagger(nn.Module):
    """A bidirectional LSTM over embedded tokens, with attention before the output."""

    def __init__(self, tokens=50, width=16):
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(2 * width, 4, batch_first=True)
        self.out = nn.Linear(2 * width, 5)

    def forward(self, tokens):
        hidden, _ = self.lstm(self.embed(tokens))
        mixed, _ = self.attention(hidden, hidden, hidden)
        return self.out(mixed)


def resnet():
    return ResNet(), {"x": torch.randn(4, 3, 32, 32)}


def lstm():
    return Tagger(), {"tokens": torch.randint(0, 50, (4, 12))}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 64, (2, 16))}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, 64, (2, 16))}


NETWORKS = {"resnet": resnet, "lstm": lstm, "gpt2": gpt2, "llama": llama}
