// A gallery: the picture that the address names (#r17) stands on top with its nearest neighbours. So every step is a
// link, and the browser's back button walks back.
const near = document.getElementById("near");
const list = near.querySelector("ul");
const cards = [...document.querySelectorAll("#all a.card")];
const byRow = new Map(cards.map((card) => [card.dataset.row, card]));

function show() {
  document.querySelectorAll(".is-here").forEach((card) => card.classList.remove("is-here"));
  const card = location.hash.startsWith("#r") && byRow.get(location.hash.slice(2));
  near.hidden = !card;
  if (near.hidden) return;
  card.classList.add("is-here");
  near.querySelector(".well").replaceChildren(...card.querySelector(".well").cloneNode(true).childNodes);
  near.querySelector("h2").textContent = card.querySelector(".caption").textContent;
  near.querySelector("p").textContent = card.dataset.near
    ? `row ${card.dataset.row}; its nearest neighbours, the nearest first`
    : `row ${card.dataset.row}; it has no vector, so no neighbours`;
  list.replaceChildren(...neighbours(card));
  near.scrollIntoView({ block: "start" });
}

function neighbours(card) {
  const pairs = (card.dataset.near || "").split(" ").filter(Boolean).map((pair) => pair.split(":"));
  return pairs.map(([row, score]) => {
    const item = document.createElement("li");
    const copy = byRow.get(row).cloneNode(true);
    copy.classList.remove("is-here");
    const line = document.createElement("div");
    line.className = "score";
    line.append(Object.assign(document.createElement("b"), { textContent: score }));
    copy.querySelector(".about").prepend(line);
    item.append(copy);
    return item;
  });
}

function filter(event) {
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const card of cards) {
    const text = card.querySelector(".caption").textContent.toLowerCase();
    card.parentElement.hidden = !words.every((word) => text.includes(word));
  }
}

function step(event) {
  if (near.hidden || event.target.matches("input") || event.altKey || event.ctrlKey || event.metaKey) return;
  const here = cards.findIndex((card) => card.classList.contains("is-here"));
  const next = { ArrowLeft: cards[here - 1], ArrowRight: cards[here + 1] }[event.key];
  if (next) location.hash = `r${next.dataset.row}`;
  if (event.key === "Escape") close();
}

function close() {
  history.pushState(null, "", location.pathname + location.search);
  show();
}

addEventListener("hashchange", show);
addEventListener("popstate", show);
addEventListener("keydown", step);
near.querySelector("button").addEventListener("click", close);
document.querySelector("input[type=search]").addEventListener("input", filter);
show();
