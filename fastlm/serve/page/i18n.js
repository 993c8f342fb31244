// The page's words in English and Korean. `t(name, values)` fills {names} in.

const WORDS = {
  en: {
    "skip": "Skip to content",
    "views": "Views",
    "theme": "Theme",
    "theme-auto": "system",
    "theme-light": "light",
    "theme-dark": "dark",
    "key": "This server asks for its key.",
    "key-use": "Use it",
    "tab-tokens": "Tokens",
    "tab-next": "Next token",
    "tab-generate": "Generate",
    "tab-attention": "Attention",
    "tab-training": "Training",
    "context": "{model}, context of {tokens} tokens",
    "text": "Text",
    "short-text": "Short text",
    "beginning": "Beginning",
    "tokens-lead": "A model reads numbers, not letters. Here is your text as each vocabulary cuts it; the same token has the same colour.",
    "tokens-count": "{count} tokens",
    "tokens-count-1": "1 token",
    "tokens-rate": "{rate} bytes a token, vocabulary of {size}",
    "tokens-strip": "Tokens of {name}",
    "tokens-hint": "Point at a token, or move with the arrow keys, to see its bytes.",
    "tokens-detail": "id {id}, bytes",
    "tokens-more": "and {count} more",
    "next-lead": "What may come next, and how temperature and filters change it. Choose a token to put it behind the text.",
    "next-summary": "{kept} of {size} tokens can be drawn; entropy {entropy} nats. The mark on each bar is the model's own probability.",
    "temperature": "Temperature",
    "off": "off",
    "greedy": "0, the likeliest",
    "all": "all",
    "never": "out",
    "append": "{token}: {percent}. Put it behind the text.",
    "generate-lead": "Each token is shaded by how surprising it was. Choose one to see what else the model might have said, and go on from there.",
    "generate-start": "Generate",
    "generate-stop": "Stop",
    "length": "Tokens",
    "seed": "Seed",
    "expected": "expected",
    "surprising": "surprising",
    "written": "Generated tokens",
    "written-empty": "What the model writes appears here.",
    "written-summary": "{count} tokens, {speed} a second",
    "alternatives": "Instead of {token}",
    "choose": "{token}: {percent}. Go on with it.",
    "close": "Close",
    "attention-lead": "Each row is a token, and shows which earlier tokens it looks at in the chosen layer and head.",
    "layer": "Layer",
    "head": "Head",
    "of": "{index} of {count}",
    "map": "Attention map",
    "attention-hint": "Point at a cell, or move with the arrow keys.",
    "attention-cell": "{query} looks at {key}: {percent}",
    "training-lead": "How the loss fell while this model was trained. Lower is better.",
    "curve": "Loss curve",
    "run": "Run",
    "steps": "Steps",
    "last-train": "Training loss at the end",
    "last-valid": "Validation loss at the end",
    "perplexity": "Perplexity",
    "train": "training",
    "valid": "validation",
    "step": "step",
    "loss": "loss, nats a token",
    "readout": "Step {step}: training {train}",
    "readout-valid": "Step {step}: training {train}, validation {valid}",
    "unreachable": "The server does not answer. Is it still running?",
  },
  ko: {
    "skip": "본문으로 건너뛰기",
    "views": "보기",
    "theme": "화면",
    "theme-auto": "시스템",
    "theme-light": "밝게",
    "theme-dark": "어둡게",
    "key": "이 서버를 쓰려면 키가 필요합니다.",
    "key-use": "사용",
    "tab-tokens": "토큰",
    "tab-next": "다음 토큰",
    "tab-generate": "생성",
    "tab-attention": "어텐션",
    "tab-training": "학습",
    "context": "{model}, 문맥 길이 {tokens}토큰",
    "text": "글",
    "short-text": "짧은 글",
    "beginning": "글의 시작",
    "tokens-lead": "모델은 글자가 아니라 숫자를 읽습니다. 같은 글을 어휘마다 어떻게 나누는지 비교해 보세요. 같은 토큰은 같은 색입니다.",
    "tokens-count": "토큰 {count}개",
    "tokens-count-1": "토큰 1개",
    "tokens-rate": "토큰당 {rate}바이트, 어휘 {size}개",
    "tokens-strip": "{name}의 토큰",
    "tokens-hint": "토큰에 마우스를 올리거나 화살표 키로 옮겨 가면 바이트가 보입니다.",
    "tokens-detail": "번호 {id}, 바이트",
    "tokens-more": "외 {count}개",
    "next-lead": "다음에 올 수 있는 토큰과, 온도와 필터에 따라 달라지는 확률입니다. 토큰을 고르면 글 뒤에 붙습니다.",
    "next-summary": "토큰 {size}개 가운데 {kept}개를 뽑을 수 있고, 엔트로피는 {entropy}나트입니다. 막대의 눈금은 모델의 원래 확률입니다.",
    "temperature": "온도",
    "off": "끔",
    "greedy": "0, 가장 유력한 것만",
    "all": "전부",
    "never": "제외",
    "append": "{token}: {percent}. 글 뒤에 붙입니다.",
    "generate-lead": "예상 밖의 토큰일수록 짙게 칠합니다. 토큰을 고르면 모델이 쓸 수 있었던 다른 토큰을 보고, 거기서부터 이어 쓸 수 있습니다.",
    "generate-start": "생성",
    "generate-stop": "멈춤",
    "length": "토큰 수",
    "seed": "시드",
    "expected": "예상대로",
    "surprising": "예상 밖",
    "written": "생성된 토큰",
    "written-empty": "모델이 쓴 글이 여기에 나타납니다.",
    "written-summary": "토큰 {count}개, 초당 {speed}개",
    "alternatives": "{token} 대신",
    "choose": "{token}: {percent}. 이것으로 이어 씁니다.",
    "close": "닫기",
    "attention-lead": "행마다 토큰 하나이고, 고른 층과 헤드에서 그 토큰이 앞의 어떤 토큰을 보는지 나타냅니다.",
    "layer": "층",
    "head": "헤드",
    "of": "{count}개 중 {index}",
    "map": "어텐션 지도",
    "attention-hint": "칸에 마우스를 올리거나 화살표 키로 옮겨 보세요.",
    "attention-cell": "{query} 토큰이 {key} 토큰을 보는 비중: {percent}",
    "training-lead": "이 모델을 학습하는 동안 손실이 줄어든 과정입니다. 낮을수록 좋습니다.",
    "curve": "손실 곡선",
    "run": "학습 이름",
    "steps": "단계",
    "last-train": "마지막 학습 손실",
    "last-valid": "마지막 검증 손실",
    "perplexity": "퍼플렉시티",
    "train": "학습",
    "valid": "검증",
    "step": "단계",
    "loss": "손실, 토큰당 나트",
    "readout": "{step}단계: 학습 {train}",
    "readout-valid": "{step}단계: 학습 {train}, 검증 {valid}",
    "unreachable": "서버가 응답하지 않습니다. 아직 실행 중인가요?",
  },
};

let language = "en";
const listeners = [];

export function t(name, values = {}) {
  return WORDS[language][name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

export function onLanguage(listener) {
  listeners.push(listener);
}

export function number(value, digits = 0) {
  return value.toLocaleString(language, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function percent(value) {
  const digits = value >= 0.0995 ? 0 : value >= 0.00995 ? 1 : 2;
  return value > 0 && value < 0.0001 ? "< 0.01 %" : `${number(value * 100, digits)} %`;
}

export function setLanguage(wanted) {
  language = wanted;
  document.documentElement.lang = wanted;
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
  for (const listener of listeners) listener();
}

export function currentLanguage() {
  return language;
}
