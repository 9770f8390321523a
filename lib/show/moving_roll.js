// Moves every roll of the page that stands still. lib/show/moving_roll.py draws the pictures and puts
// this text behind each, since a page may show one output alone, or many, or the same one twice.
document.querySelectorAll("figure.moving-roll:not(.moves)").forEach((figure) => {
  const audio = figure.querySelector("audio"), image = figure.querySelector("img");
  const text = decodeURIComponent(image.src.slice(image.src.indexOf(",") + 1));
  const roll = document.importNode(new DOMParser().parseFromString(text, "image/svg+xml").documentElement, true);
  const { left, keys, row, end } = roll.dataset, { width, height } = roll.viewBox.baseVal;
  const notes = [...roll.querySelectorAll(".notes path")].flatMap((path) =>
    [...path.getAttribute("d").matchAll(/M(\S+) (\S+)h(\d+)/g)].map((found) => found.slice(1).map(Number)));
  const set = (element, attributes) => {
    for (const name in attributes) element.setAttribute(name, attributes[name]);
  };
  const line = (look) => {
    const path = document.createElementNS(roll.namespaceURI, "path");
    set(path, look);
    return roll.appendChild(path);
  };
  const lit = line({ stroke: "#009E73", "stroke-width": row });
  const cursor = line({ stroke: "#D55E00", "stroke-width": 8 });

  const draw = () => {
    const now = audio.currentTime, x = +left + (width - left) * Math.min(1, now / end);
    const sounding = notes.filter(([from, , long]) => from <= x && x < from + long);
    set(lit, { d: sounding.map(([from, y, long]) => `M${keys} ${y}H${left}M${from} ${y}h${long}`).join("") });
    set(cursor, { d: `M${x} 0V${height - 50}` });
    set(roll, { "aria-valuenow": now.toFixed(1), "aria-valuetext": `${now.toFixed(1)} seconds` });
  };
  const run = () => {
    draw();
    if (!audio.paused) requestAnimationFrame(run);
  };
  const move = (second) => {
    audio.currentTime = Math.max(0, Math.min(second, end - 0.05));
    draw();
  };
  const point = (event) => {
    const box = roll.getBoundingClientRect();
    move(((event.clientX - box.left) / box.width * width - left) / (width - left) * end);
  };
  roll.onpointerdown = (event) => {
    roll.setPointerCapture(event.pointerId);
    point(event);
  };
  roll.onpointermove = (event) => event.buttons && point(event);
  roll.onclick = () => audio.play();
  roll.onkeydown = (event) => {
    const now = audio.currentTime;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: +end }[event.key];
    if (event.key === " ") audio.paused ? audio.play() : audio.pause();
    else if (to === undefined) return;
    else move(to);
    event.preventDefault();
    event.stopPropagation();
  };
  audio.addEventListener("timeupdate", draw);
  audio.addEventListener("play", () => {
    document.querySelectorAll("figure.moving-roll audio").forEach((other) => other === audio || other.pause());
    run();
  });

  set(roll, { role: "slider", tabindex: 0, style: "display:block;width:100%;cursor:pointer;touch-action:pan-y",
    "aria-label": image.alt + ". Arrow keys move, space plays.", "aria-valuemin": 0, "aria-valuemax": end });
  image.replaceWith(roll);
  figure.classList.add("moves");
  draw();
});
