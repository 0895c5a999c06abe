# Completion of osora, written by `make completions` from the commands: do not edit.
_osora() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} verb="" words="" word
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        [[ $word == -* ]] || { verb=$word; break; }
    done
    COMPREPLY=()
    case "$verb $previous" in
        "sample --prompt"|"sample -p") compopt +o default; return ;;
        "sample --prompt-file") return ;;
        "sample --num-samples"|"sample -n") compopt +o default; return ;;
        "sample --frames") compopt +o default; return ;;
        "sample --size") compopt +o default; return ;;
        "sample --fps") compopt +o default; return ;;
        "sample --model"|"sample -m") COMPREPLY=($(compgen -W 'bundled opensora-v1-16x256x256 opensora-v1-hq-16x256x256 opensora-v1-hq-16x512x512 dit-xl-2-256 dit-xl-2-512 latte-xl-2-ucf101 latte-1 pixart-256 pixart-sam-256 pixart-512 pixart-1024-ms' -- "$current")); return ;;
        "sample --lora") return ;;
        "sample --preset") COMPREPLY=($(compgen -W 'tiny 1x256x256 1x512x512 16x256x256 16x256x256-hq 16x512x512 64x512x512 dit-16x256x256 dit-16x256x256-2x2 dit-1x256x256 dit-1x256x256-class dit-1x512x512-class latte-16x256x256 latte-16x256x256-2x2 latte-16x256x256-class latte-1-16x512x512 pixart-1x512x512 pixart-1x256x256 pixart-1x1024-ms pixart-16x256x256' -- "$current")); compopt +o default; return ;;
        "sample --config") return ;;
        "sample --set") compopt +o default; return ;;
        "sample --steps") compopt +o default; return ;;
        "sample --guidance") compopt +o default; return ;;
        "sample --sampler") COMPREPLY=($(compgen -W 'iddpm ddim dpm-solver dpm-solver++ unipc euler heun' -- "$current")); compopt +o default; return ;;
        "sample --seed") compopt +o default; return ;;
        "sample --batch-size") compopt +o default; return ;;
        "sample --output"|"sample -o") return ;;
        "sample --format") COMPREPLY=($(compgen -W 'mp4 gif webp png' -- "$current")); compopt +o default; return ;;
        "sample --device") COMPREPLY=($(compgen -W 'auto cpu cuda mps' -- "$current")); compopt +o default; return ;;
        "sample --dtype") COMPREPLY=($(compgen -W 'auto fp32 bf16 fp16' -- "$current")); compopt +o default; return ;;
        "sample --gpus") compopt +o default; return ;;
        "sample --parallel") COMPREPLY=($(compgen -W 'sequence=2 data=2 cfg=2' -- "$current")); compopt +o default; return ;;
        "download --all-for") COMPREPLY=($(compgen -W 'sample train' -- "$current")); compopt +o default; return ;;
        "download --to") return ;;
        "download --from") compopt +o default; return ;;
        "download --preset") COMPREPLY=($(compgen -W 'tiny 1x256x256 1x512x512 16x256x256 16x256x256-hq 16x512x512 64x512x512 dit-16x256x256 dit-16x256x256-2x2 dit-1x256x256 dit-1x256x256-class dit-1x512x512-class latte-16x256x256 latte-16x256x256-2x2 latte-16x256x256-class latte-1-16x512x512 pixart-1x512x512 pixart-1x256x256 pixart-1x1024-ms pixart-16x256x256' -- "$current")); compopt +o default; return ;;
        "download --metadata") return ;;
        "download --query") compopt +o default; return ;;
        "download --min-height") compopt +o default; return ;;
        "download --limit") compopt +o default; return ;;
        "download --config") return ;;
        "download --set") compopt +o default; return ;;
        "download --output"|"download -o") return ;;
        "download --workers") compopt +o default; return ;;
        "download --max-rate") compopt +o default; return ;;
        "split --detector") COMPREPLY=($(compgen -W 'auto content adaptive threshold histogram hash' -- "$current")); compopt +o default; return ;;
        "split --threshold") compopt +o default; return ;;
        "split --boundaries") return ;;
        "split --min-seconds") compopt +o default; return ;;
        "split --max-seconds") compopt +o default; return ;;
        "split --trim") compopt +o default; return ;;
        "split --fps") compopt +o default; return ;;
        "split --short-side") compopt +o default; return ;;
        "split --cut") COMPREPLY=($(compgen -W 'exact copy smart none' -- "$current")); compopt +o default; return ;;
        "split --codec") COMPREPLY=($(compgen -W 'libx264 libx265 h264_nvenc hevc_nvenc h264_videotoolbox auto' -- "$current")); compopt +o default; return ;;
        "split --codec-preset") COMPREPLY=($(compgen -W 'ultrafast veryfast faster fast medium slow' -- "$current")); compopt +o default; return ;;
        "split --crf") compopt +o default; return ;;
        "split --why") compopt +o default; return ;;
        "split --config") return ;;
        "split --set") compopt +o default; return ;;
        "split --output"|"split -o") return ;;
        "split --stats") return ;;
        "split --workers") compopt +o default; return ;;
        "split --engine") COMPREPLY=($(compgen -W 'local ray' -- "$current")); compopt +o default; return ;;
        "split --ray-address") compopt +o default; return ;;
        "split --shard") compopt +o default; return ;;
        "caption --model"|"caption -m") COMPREPLY=($(compgen -W 'tiny labels sidecars hf: openai:' -- "$current")); return ;;
        "caption --base-url") compopt +o default; return ;;
        "caption --quantise") COMPREPLY=($(compgen -W 'none 8bit 4bit' -- "$current")); compopt +o default; return ;;
        "caption --frames") compopt +o default; return ;;
        "caption --layout") COMPREPLY=($(compgen -W 'auto separate grid' -- "$current")); compopt +o default; return ;;
        "caption --prompt") return ;;
        "caption --temperature") compopt +o default; return ;;
        "caption --max-tokens") compopt +o default; return ;;
        "caption --language") compopt +o default; return ;;
        "caption --config") return ;;
        "caption --set") compopt +o default; return ;;
        "caption --output"|"caption -o") return ;;
        "caption --preview") compopt +o default; return ;;
        "caption --batch-size") compopt +o default; return ;;
        "caption --gpus") compopt +o default; return ;;
        "caption --requests") compopt +o default; return ;;
        "caption --engine") COMPREPLY=($(compgen -W 'local ray' -- "$current")); compopt +o default; return ;;
        "caption --ray-address") compopt +o default; return ;;
        "caption --device") COMPREPLY=($(compgen -W 'auto cpu cuda mps' -- "$current")); compopt +o default; return ;;
        "caption --dtype") COMPREPLY=($(compgen -W 'auto fp32 bf16 fp16' -- "$current")); compopt +o default; return ;;
        "train --data") COMPREPLY=($(compgen -W 'world' -- "$current")); compopt +o default; return ;;
        "train --cache") return ;;
        "train --max-rejects") compopt +o default; return ;;
        "train --stage") COMPREPLY=($(compgen -W '1 2 3' -- "$current")); compopt +o default; return ;;
        "train --recipe") COMPREPLY=($(compgen -W 'three-stages' -- "$current")); compopt +o default; return ;;
        "train --init") COMPREPLY=($(compgen -W 'bundled opensora-v1-16x256x256 opensora-v1-hq-16x256x256 opensora-v1-hq-16x512x512 dit-xl-2-256 dit-xl-2-512 latte-xl-2-ucf101 latte-1 pixart-256 pixart-sam-256 pixart-512 pixart-1024-ms' -- "$current")); return ;;
        "train --steps") compopt +o default; return ;;
        "train --batch-size") compopt +o default; return ;;
        "train --lr") compopt +o default; return ;;
        "train --lora-rank") compopt +o default; return ;;
        "train --seed") compopt +o default; return ;;
        "train --preset") COMPREPLY=($(compgen -W 'tiny 1x256x256 1x512x512 16x256x256 16x256x256-hq 16x512x512 64x512x512 dit-16x256x256 dit-16x256x256-2x2 dit-1x256x256 dit-1x256x256-class dit-1x512x512-class latte-16x256x256 latte-16x256x256-2x2 latte-16x256x256-class latte-1-16x512x512 pixart-1x512x512 pixart-1x256x256 pixart-1x1024-ms pixart-16x256x256' -- "$current")); compopt +o default; return ;;
        "train --config") return ;;
        "train --set") compopt +o default; return ;;
        "train --output"|"train -o") return ;;
        "train --resume") compopt +o default; return ;;
        "train --keep") compopt +o default; return ;;
        "train --export") return ;;
        "train --dry-run") compopt +o default; return ;;
        "train --write-manifest") return ;;
        "train --device") COMPREPLY=($(compgen -W 'auto cpu cuda mps' -- "$current")); compopt +o default; return ;;
        "train --dtype") COMPREPLY=($(compgen -W 'auto fp32 bf16 fp16' -- "$current")); compopt +o default; return ;;
        "train --gpus") compopt +o default; return ;;
        "train --nodes") compopt +o default; return ;;
        "train --hostfile") return ;;
        "train --max-restarts") compopt +o default; return ;;
        "train --parallel") COMPREPLY=($(compgen -W 'sequence=2 data=2 cfg=2' -- "$current")); compopt +o default; return ;;
        "train --engine") COMPREPLY=($(compgen -W 'torch colossalai' -- "$current")); compopt +o default; return ;;
        "bench --model"|"bench -m") COMPREPLY=($(compgen -W 'bundled opensora-v1-16x256x256 opensora-v1-hq-16x256x256 opensora-v1-hq-16x512x512 dit-xl-2-256 dit-xl-2-512 latte-xl-2-ucf101 latte-1 pixart-256 pixart-sam-256 pixart-512 pixart-1024-ms' -- "$current")); return ;;
        "bench --preset") COMPREPLY=($(compgen -W 'tiny 1x256x256 1x512x512 16x256x256 16x256x256-hq 16x512x512 64x512x512 dit-16x256x256 dit-16x256x256-2x2 dit-1x256x256 dit-1x256x256-class dit-1x512x512-class latte-16x256x256 latte-16x256x256-2x2 latte-16x256x256-class latte-1-16x512x512 pixart-1x512x512 pixart-1x256x256 pixart-1x1024-ms pixart-16x256x256' -- "$current")); compopt +o default; return ;;
        "bench --prompts") compopt +o default; return ;;
        "bench --seeds") compopt +o default; return ;;
        "bench --data") compopt +o default; return ;;
        "bench --plan") COMPREPLY=($(compgen -W 'h100 h200 h800 a100 a100-25gbe' -- "$current")); compopt +o default; return ;;
        "bench --output"|"bench -o") return ;;
        "bench --config") return ;;
        "bench --set") compopt +o default; return ;;
        "bench --device") COMPREPLY=($(compgen -W 'auto cpu cuda mps' -- "$current")); compopt +o default; return ;;
        "bench --dtype") COMPREPLY=($(compgen -W 'auto fp32 bf16 fp16' -- "$current")); compopt +o default; return ;;
    esac
    case "$verb" in
        '') words='sample download split caption train bench --version --help' ;;
        'sample') words='--prompt --prompt-file --num-samples --frames --size --fps --model --lora --preset --config --set --steps --guidance --sampler --seed --batch-size --output --format --overwrite --sheet --device --dtype --compile --offload --offline --gpus --parallel --print-config --dry-run --json --debug --help' ;;
        'download') words='data opensora-v1-16x256x256 opensora-v1-hq-16x256x256 opensora-v1-hq-16x512x512 dit-xl-2-256 dit-xl-2-512 latte-xl-2-ucf101 latte-1 pixart-256 pixart-sam-256 pixart-512 pixart-1024-ms sd-vae-ft-ema sd-vae-ft-mse t5-v1_1-xxl clip-vit-b-32 --all-for --list --verify --to --from --preset --metadata --query --min-height --limit --config --set --output --workers --max-rate --offline --dry-run --print-config --json --debug --help' ;;
        'split') words='--detector --threshold --fast --boundaries --min-seconds --max-seconds --trim --fps --short-side --crop-black-bars --no-audio --audio --cut --codec --codec-preset --crf --fast-decode --no-filter --filter --only-filter --why --report --config --set --output --redo --preview --stats --workers --engine --ray-address --shard --dry-run --print-config --json --debug --help' ;;
        'caption') words='--model --base-url --quantise --frames --layout --prompt --temperature --max-tokens --clean --camera --language --config --set --output --redo --retry-failed --preview --batch-size --gpus --requests --engine --ray-address --device --dtype --offline --dry-run --print-config --json --debug --help' ;;
        'train') words='--data --cache --cache-only --max-rejects --stage --recipe --init --steps --batch-size --lr --lora-rank --seed --preset --config --set --output --resume --keep --export --dry-run --write-manifest --device --dtype --compile --gpus --nodes --hostfile --submit --max-restarts --parallel --engine --print-config --json --debug --help' ;;
        'bench') words='world train data split scaling --model --preset --quick --prompts --seeds --data --plan --output --config --set --device --dtype --json --debug --help' ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _osora osora
